"""One stage of training or use a file, the only place where everything meets; each reads top to bottom like the run itself."""
