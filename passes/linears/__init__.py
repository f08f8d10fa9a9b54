"""Spellings of a product with a weight.

spellings  which argument is the weight, and which Einstein sum it is
einsum     that sum as a canonical product
experts    stacks of experts
"""
