"""What a checkpoint on disk is: its family, its small files, its chat format, its weights."""
