"""Memory of a training step, known before it is spent.

plan               ``qlora_fx.plan``
estimate           a traced model, evaluated for any sizes
fit                the nearest settings that fit
resident           what is held all the time
report             the printed plan
saved_activations  what is held from forward to backward
"""
