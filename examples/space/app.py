"""A Space that shows FlexiCodec. The variable MODEL of the Space names the model's repository."""

import os
from pathlib import Path

from flexicodec_hf.cli import main


if __name__ == "__main__":
    clips = Path(__file__).parent / "clips"
    main(["app", "--model", os.environ["MODEL"], "--clips", str(clips), "--host", "0.0.0.0", "--port", "7860"])
