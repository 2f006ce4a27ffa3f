"""The scale-invariant recipe (Li et al. 2022): attention, clipping, and the probe of what breaks it."""
