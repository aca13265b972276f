"""megatron_llama3: the Llama 3 training system, 4D-parallel, readable in a weekend."""
