"""Regenerates the code of all .proto files, and its stubs:  python -m protocol.generate"""

import sys
from pathlib import Path

HERE = Path(__file__).parent


def generate(out: Path = HERE) -> None:
    """Write `swarm_pb2.py`, `membership/membership_pb2.py` and their stubs into `out`. Needs grpcio-tools (the `dev`
    extra)."""
    from grpc_tools import protoc

    files = map(str, (HERE / "swarm.proto", HERE / "membership" / "membership.proto"))
    code = protoc.main(["protoc", f"-I{HERE}", f"--python_out={out}", f"--pyi_out={out}", *files])
    if code:
        raise RuntimeError(f"protoc failed with exit code {code}")


if __name__ == "__main__":
    generate()
    sys.exit(0)
