"""fintune: raw financial pages in, a measured and quantised language model out."""

import logging

__version__ = "0.1.0"

# When bitsandbytes is imported (by PEFT, too) it warns that it cannot fetch an optional kernel from the hub; it has its
# own for the processor. Whatever else its logger says is heard.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: "gemm_4bit_forward from kernels-community" not in str(record.msg)
)
