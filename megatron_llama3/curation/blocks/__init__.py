"""What a pipeline's YAML can name: each module holds one block, or a family of them (`formulas` is a part of `extract`)."""
