"""Settings, schema, rules, composition with Hydra. Imports no torch."""
