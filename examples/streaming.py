"""An answer that is read while it grows, and one that is left in the middle, which stops the engine.

Run it with ``python examples/streaming.py``.
"""

from __future__ import annotations

from lmbridge import Bridge

if __name__ == "__main__":
    with Bridge("demo") as bridge:
        stream = bridge.stream("Tell me a story about a fox.")
        for delta in stream:
            print(delta.text, end="", flush=True)
        print("\n", stream.response.usage, stream.response.timings)

        text = ""
        stream = bridge.stream("Tell me a story about an owl.")
        for delta in stream:
            text += delta.text
            if len(text) > 30:
                break  # leaving the loop aborts the generation
        print(text, "...")
        print("The second story ended with:", stream.response.finish_reason)
