"""megatron_llama3: the Llama 3 training system, 4D-parallel, its spine readable in a weekend."""
