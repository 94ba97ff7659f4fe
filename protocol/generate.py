"""Regenerates swarm_pb2.py and its stub from swarm.proto:  python -m protocol.generate"""

import sys
from pathlib import Path

HERE = Path(__file__).parent


def generate(out: Path = HERE) -> None:
    """Write `swarm_pb2.py` and `swarm_pb2.pyi` into `out`. Needs grpcio-tools (the `dev` extra)."""
    from grpc_tools import protoc

    code = protoc.main(["protoc", f"-I{HERE}", f"--python_out={out}", f"--pyi_out={out}", str(HERE / "swarm.proto")])
    if code:
        raise RuntimeError(f"protoc failed with exit code {code}")


if __name__ == "__main__":
    generate()
    sys.exit(0)
