"""The one partition dimension: a seed set is a data set with a history of its own.

What must not live here: how seed sets are found.
"""

import dagster as dg

seed_sets = dg.DynamicPartitionsDefinition(name="seed_sets")
