"""Serving engines: plug-ins that have their FFNs decode sparsely. Nothing of the package imports this folder.

`vllm` is the plug-in of vLLM, which finds it by its entry point. Importing any of this but `ffn` and `mlp` imports no torch.
"""
