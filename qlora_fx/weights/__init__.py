"""A model in 4 bits as data.

base          skeleton, config, sites, store, origin
move          a real model's weights into a store
"""
