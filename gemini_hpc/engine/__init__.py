"""DeepSpeed ZeRO-3 with a process group that can be exchanged under it.

The only room that imports torch.distributed and deepspeed.
"""
