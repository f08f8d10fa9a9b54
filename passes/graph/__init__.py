"""What all passes share.

nodes    how nodes are made, how stored tensors enter, what a node is
values   fake values, and what a value looks like as text
site     verdicts, and how a weight is read
weights  which parameter a weight argument reads, and how
flops    of a product, at the example's sizes
blocks   which repeated block of the model a node is in
body     some nodes as a graph of their own
"""
