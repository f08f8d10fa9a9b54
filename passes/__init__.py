"""Graph to graph, one rewrite per file. Knows nothing of training. In the order of qlora_fx/compiler/pipeline.py:

normalize     every product with a weight as ``linear`` or ``grouped_linear``; linears/ has the spellings
select        a verdict for each; selection/ has places, targets, routers, and what was not recognised
thaw          dense tensors that train themselves
quantize      selected weights from storage; schemes/ has the nodes of each scheme
adapt         a branch at each adapted site; adapters/ has the nodes of each kind
few_rows      products of a token that is generated, with weights as they are stored
siblings      one product where several adapters read one input
attention     a kernel that skips what a causal mask hides
convolutions  forms that compile once for every length
masked_rows   features in the places of their placeholders
loss_head     cross-entropy without logits
outline       equal blocks as one body
lower         bodies to programs; lowering/ has partition, recomputation, what operators cost

graph/        what all share: how nodes are made, verdicts, weights, FLOPs, what a block is, bodies
"""
