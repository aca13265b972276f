"""Commands over files: `python tools/NAME.py` in a checkout, `llama3-NAME` once installed; megatron_llama3_tools in the wheel."""
