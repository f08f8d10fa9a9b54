"""From a body to code.

compiled_body  a body, compiled as it is called
example        with which arguments, and for which sizes the result is right
example_graph  what is changed in a copy of it before
free_sizes     the sizes that it is compiled for any value of
on_gpu         what Inductor is given for a GPU instead: fewer launches
partition      what its forward keeps for its backward
live_bytes     what is live while it runs
operators      FLOPs, workspace and gradients of the operators that are taken whole
recorded       which parts are recorded as CUDA graphs
brief_trace    what AOTAutograd does for programs that may write, left out
one_library    the C++ kernels of a program in one file
index_arithmetic  what Inductor asks sympy, answered sooner
warm_up        what the compiler can find out beforehand
"""
