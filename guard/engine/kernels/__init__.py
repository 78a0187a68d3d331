"""What runs inside every forward pass.

ops.py         the ops by name, and which kernel serves them on which kind of device
reference.py   each in plain torch: what the others are held against
cpu.cpp        each for a CPU; native.py compiles it, once per machine
gpu.py         `read` as Triton kernels
"""

FEW = 16
"""With fewer rows than this the work is cut in another way on a GPU: what costs then is reading the directions."""
WARM_UP = (3, FEW)
"""Numbers of rows that between them use every kernel there is, so that none is compiled in a request."""
