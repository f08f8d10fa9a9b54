"""A model in 4 bits as data.

base          skeleton, config, sites, store, origin
move          a real model's weights into a store
store_module  a store as an ``nn.Module`` that can neither be moved nor copied
"""
