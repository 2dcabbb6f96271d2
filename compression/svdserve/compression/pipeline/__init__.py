"""From a recipe to a compressed directory, stage by stage."""
