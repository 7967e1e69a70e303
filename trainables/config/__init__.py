"""What a trial is: one frozen value. Plain data; knows no paper, no storage, no device and no Ray.

Whatever can change a number in the results is a field here; nothing else is. A spec travels as JSON and is validated at
both ends. `pruned()` drops what no result depends on (terms of weight zero, phases and models that nothing reads), so
that an ablation shares its phases with every trial that computes the same thing.
"""
