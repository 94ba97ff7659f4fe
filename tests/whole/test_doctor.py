"""`peer doctor` typed on one of two machines, which are network namespaces."""

import json
from pathlib import Path

from protocol.membership.certificate import Role
from tests.tools.machines import machines
from tests.tools.namespaces import Networks, Recorder
from tests.tools.swarm import ForkServer
from tests.tools.swarms import found, let_in


def test_another_machine_dials_back_and_nobody_else_is_contacted(
    networks: Networks, fork_server: ForkServer, tmp_path: Path
) -> None:
    lan = networks.lan()
    with machines(fork_server, tmp_path, networks.host("one", lan), networks.host("two", lan)) as (one, two):
        let_in(found(one.home), two.home, Role.SERVE, "two")
        one.start("bootstrap").wait_ready()
        with Recorder(two.host) as recorder:
            ended = two.try_run("doctor", "--json")
        assert recorder.outside(lan) == set()
        assert ended.code == 0, ended.stdout
        shown = json.loads(ended.stdout)["findings"]
        said = {name: [one["sentence"] for one in shown if one["check"] == name] for name in ("dial back", "NAT")}
        assert len(said["dial back"]) == 4
        for family, address in (("IPv4", two.host.addresses[0]), ("IPv6", two.host.addresses[1])):
            sentences = [text for text in said["dial back"] if text.startswith(f"Over {family} others reach")]
            assert [text.endswith(f", at {address}.") for text in sentences] == [True, True]
        assert said["NAT"] == ["Others see this machine under its own address: there is no NAT between."]
        bad = [one for one in shown if one["verdict"] != "ok" and one["check"] not in ("disk", "memory")]
        assert bad == [] or [one["check"] for one in bad] == ["peers"]  # nobody serves a model yet

        one.turn_off()
        ended = two.try_run("doctor")
        assert ended.code == 1
        assert "wrong   swarm       No other member answers.\n" in ended.stdout
        assert "the machine is there, but nothing listens at that port" in ended.stdout
