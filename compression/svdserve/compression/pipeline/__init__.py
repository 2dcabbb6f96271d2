"""The pipeline of a compression: from a recipe to a checkpoint, stage by stage."""
