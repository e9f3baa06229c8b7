"""The nine special tokens: what marks the turns and the tools. Text never encodes to one of them."""

# Their order is their identity: ids follow the merges in this order, as in upstream's checkpoints.
SPECIAL_TOKENS: tuple[str, ...] = (
    "<|bos|>",  # before every document and conversation
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",  # the assistant calls the python tool
    "<|python_end|>",
    "<|output_start|>",  # what the tool answers
    "<|output_end|>",
)
