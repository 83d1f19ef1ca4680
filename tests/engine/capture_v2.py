"""``tests.engine.capture`` on vLLM's V2 model runner."""

from __future__ import annotations

from tests.engine.interpreter import prepare

if __name__ == "__main__":
    prepare()
    from tests.engine.capture import main

    main()
