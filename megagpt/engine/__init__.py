"""How gradients cross ranks: one protocol, and the engines behind it.

The contract: gradients are SUMMED over ranks and micro-batches (the loop divides each micro-batch's summed loss by the global
number of targets). An engine hands out its fp32 weights and optimizer states as Partitions, views of its own memory: the
checkpoint writes them and reads into them, and fresh weights are drawn into them, so every engine starts and resumes the same.
"""
