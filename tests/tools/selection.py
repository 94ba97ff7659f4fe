"""Which tests run first, and which run with `pytest -m quick`. Names are those of pytest, without `tests/`."""

LONGEST = (
    "whole/test_methods.py",
    "whole/test_failover.py",
    "whole/test_parity.py",
    "whole/test_soak.py",
    "whole/test_pretended_gpu.py",
    "whole/test_chaos.py",
    "whole/test_cli.py",
    "whole/test_gpu_benchmark.py",
    "client/test_verify.py",
    "whole/test_generate.py",
    "whole/test_handover.py",
    "client/test_prefill.py",
    "peer/test_drain.py",
    "whole/test_golden.py",
    "whole/test_data_parallel.py",
    "whole/test_trl.py",
    "peer/test_memory.py",
    "peer/test_quantization.py",
    "whole/test_several_devices.py",
    "bootstrap/test_member.py",
    "client/tune/test_resume.py",
    "client/tune/test_run.py",
    "client/tune/test_swarm.py",
    "peer/test_joining.py",
    "peer/test_quotas.py",
    "client/test_factors.py",
    "client/test_dynamic_rope.py",
    "whole/test_lan.py",
    "whole/test_three_machines.py",
    "whole/test_private_swarm.py",
    "whole/test_joining.py",
    "whole/test_tutorial.py",
    "whole/test_fuzz.py",
    "client/merge/test_memory.py",
)
"""The files that take most of the time, in the order in which they run: at the end no process works alone."""

QUICK = (
    "protocol/test_cache_edits.py",
    "protocol/test_codecs.py",
    "protocol/test_devices.py",
    "protocol/test_direct.py",
    "protocol/test_handshake.py",
    "protocol/test_wire_codecs.py",
    "bootstrap/test_directory.py::test_every_member_sees_every_change_at_once",
    "bootstrap/test_door.py",
    "bootstrap/test_membership.py",
    "bootstrap/test_member.py::test_stream_echo_between_members[run1-direct]",
    "bootstrap/test_member.py::test_stream_echo_between_members[run1-libp2p]",
    "bootstrap/test_records.py",
    "bootstrap/test_seal.py",
    "gpu/test_basics.py",
    "peer/test_adapter_limits.py",
    "peer/test_device_memory.py",
    "peer/test_failures.py",
    "peer/test_inspection.py",
    "peer/test_joined_calls.py",
    "peer/test_kv_arena.py::test_a_quota_is_kept_and_given_back",
    "peer/test_kv_arena.py::test_idle_sessions_give_way_to_new_ones",
    "peer/test_kv_arena.py::test_sessions_hold_what_transformers_would_hold",
    "peer/test_packing.py::test_a_bad_step_among_good_ones",
    "peer/test_packing.py::test_a_session_that_fails_or_ends_in_the_middle",
    "peer/test_packing.py::test_lora_of_different_clients",
    "peer/test_rotary.py",
    "peer/test_wire.py",
    "client/merge/test_merge.py::test_same_as_peft_in_bf16",
    "client/merge/test_merge.py::test_untouched_tensors_and_files",
    "client/test_adapters.py",
    "client/test_refusals.py",
    "client/test_model_options.py",
    "client/test_persona.py",
    "client/test_routing.py",
    "client/test_watch.py",
    "client/tune/test_config.py",
    "client/tune/test_data.py",
    "client/tune/test_encode.py",
    "client/tune/test_packing.py",
    "client/tune/test_run.py::test_the_losses_are_those_of_a_plain_trainer",
    "whole/test_cli.py::test_status_as_json",
    "whole/test_docs.py",
    "whole/test_failover.py::test_killed_in_greedy_decoding[one peer-direct]",
    "whole/test_failover.py::test_killed_in_a_training_step[before the backward-one peer-direct]",
    "whole/test_generate.py::test_same_tokens",
    "whole/test_golden.py::test_numbers_are_what_they_were[llama LoRA --quantize nf4]",
    "whole/test_parity.py::test_logits_tokens_loss_and_gradients[llama]",
    "whole/test_rooms.py",
)
"""Files, tests, or cases of tests: some of each folder, that take a minute together."""


def rank(name: str) -> int:
    """Of a test among all: those with a lower one run first."""
    file = name.removeprefix("tests/").partition("::")[0]
    return LONGEST.index(file) if file in LONGEST else len(LONGEST)


def is_quick(name: str) -> bool:
    """Whether a test is among `QUICK`."""
    name = name.removeprefix("tests/")
    return any(name == entry or name.startswith((f"{entry}::", f"{entry}[")) for entry in QUICK)
