"""The memory model: what a config needs on a device, under every strategy, before anything is loaded.

Read `plan.plan_memory` first. `empty` builds the model without memory, `activations` runs one and two layers of it on
tensors without memory, `strategies` knows what each strategy holds, `devices` what there is.
"""
