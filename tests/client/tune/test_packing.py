"""Packed rows must teach what the same records teach apart."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, BloomConfig, GPT2Config, LlamaConfig

from client.tune.data.encode import Example
from client.tune.data.packing import check_packing, pack
from client.tune.errors import ConfigError
from client.tune.running.dataset import Collator, prepare
from tests.tools.tune import byte_tokenizer, describe, start, tiny_llama

FAMILY = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def example(length: int) -> Example:
    ids = torch.arange(length, dtype=torch.int32)
    return Example(ids, ids, 0)


@given(st.lists(st.integers(1, 20), max_size=60))
def test_packing_keeps_every_example_and_no_row_is_too_long(lengths: list[int]) -> None:
    rows = pack([example(length) for length in lengths], 20)
    assert sorted(len(one) for row in rows for one in row) == sorted(lengths)
    assert all(0 < sum(map(len, row)) <= 20 for row in rows)
    used = sorted(sum(map(len, row)) for row in rows)
    assert len(rows) < 2 or used[0] + used[1] > 20  # no two rows could have been one


def test_a_packed_batch_has_positions_and_no_mask() -> None:
    batch = Collator(packing=True, pad=99)([[example(3), example(2)], [example(2)]])
    assert batch.keys() == {"input_ids", "labels", "position_ids"}
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]
    assert batch["input_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 99, 99, 99]]
    assert batch["labels"].tolist()[1] == [0, 1, -100, -100, -100]


def test_an_unpacked_batch_is_padded_to_its_longest_row() -> None:
    batch = Collator(packing=False, pad=99)([[example(3)], [example(2)]])
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["input_ids"].tolist() == [[0, 1, 2], [0, 1, 99]]
    assert batch["labels"].tolist() == [[0, 1, 2], [0, 1, -100]]
    assert {value.dtype for value in batch.values()} == {torch.int64}


@pytest.mark.parametrize("train_on", ["answers", "all"])
def test_packed_loss_and_gradients_are_those_of_the_records_apart(
    tmp_path_factory: pytest.TempPathFactory, train_on: str
) -> None:
    folder = tmp_path_factory.mktemp("packing")
    results = []
    for packing in (False, True):
        config = describe(folder, data={"packing": packing, "train_on": train_on, "max_length": 120})
        rows = prepare(config, byte_tokenizer(), 256).train
        batch = Collator(packing, 257)([rows[index] for index in range(len(rows))])
        assert batch["input_ids"].shape[0] == (4 if packing else 12)
        model = tiny_llama().eval()
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        results.append((loss.detach(), model.model.layers[0].self_attn.q_proj.weight.grad))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "config", [LlamaConfig(**FAMILY, intermediate_size=64, num_key_value_heads=2), GPT2Config(**FAMILY)]
)
def test_families_that_keep_packed_records_apart(config: LlamaConfig | GPT2Config) -> None:
    model = AutoModelForCausalLM.from_config(config).train()
    check_packing(model)
    assert model.training


def test_a_family_that_takes_no_positions_is_refused() -> None:
    model = AutoModelForCausalLM.from_config(BloomConfig(**FAMILY))
    with pytest.raises(ConfigError, match=r"BloomForCausalLM .*; switch packing off"):
        check_packing(model)


def test_a_family_that_mixes_records_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda positions: None)
    with pytest.raises(ConfigError, match="LlamaForCausalLM mixes the records of a row; switch packing off"):
        check_packing(tiny_llama())


def test_the_plan_counts_packed_rows(tmp_path_factory: pytest.TempPathFactory) -> None:
    config = describe(tmp_path_factory.mktemp("run"), data={"packing": True, "max_length": 120})
    plan = start(config).plan()
    assert (plan.records, plan.rows, plan.longest) == (12, 4, 120)
