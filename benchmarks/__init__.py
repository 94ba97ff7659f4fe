"""What the product does, in numbers: benchmarks/RESULTS.md."""

from protocol.machine.openmp import spin_briefly

spin_briefly()  # as `import client` does in a user's program: most benchmarks come to it after torch
