"""The recipes for Gradio and Streamlit, asked as their pages ask them."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor

import pytest

from lmbridge import Bridge
from tests.examples.recipes.conftest import RECIPES, Serve, free_port, needs


@needs("gradio")
@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_gradio(serve: Serve) -> None:
    """Visitors of a page would wait for each other, or see no answer grow."""
    gradio_client = pytest.importorskip("gradio_client")
    port = free_port()
    page = serve("gradio_app.py", env={"GRADIO_SERVER_PORT": str(port), "GRADIO_ANALYTICS_ENABLED": "False"})
    page.until("Running on local URL")

    def parts(question: str) -> list[str]:
        visitor = gradio_client.Client(f"http://127.0.0.1:{port}", verbose=False)
        said = list(visitor.submit(message=question, api_name="/reply"))
        visitor.close()
        return said

    with ThreadPoolExecutor(2) as pool:
        story, capital = pool.map(parts, ["Tell me a story about a fox.", "What is the capital of Peru?"])
    assert len(story) > 3
    assert story[-1].startswith(story[0])
    assert "fox" in story[-1]
    assert "Lima" in capital[-1]
    page.stop()
    assert "Traceback" not in page.output


@needs("streamlit")
@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_streamlit() -> None:
    """A rerun would load the model again, or lose the conversation."""
    testing = pytest.importorskip("streamlit.testing.v1")
    caching = pytest.importorskip("streamlit")
    try:
        sessions = [testing.AppTest.from_file(str(RECIPES / "streamlit_app.py"), default_timeout=60) for _ in range(2)]
        for session in sessions:
            session.run().chat_input[0].set_value("What is the capital of Peru?").run()
            session.chat_input[0].set_value("What is 2 + 3?").run()
            assert [message.markdown[0].value for message in session.chat_message] == [
                "What is the capital of Peru?",
                "The capital of Peru is Lima.",
                "What is 2 + 3?",
                "2 + 3 = 5.",
            ]
        shared = {id(bridge) for bridge in bridges()}
        assert len(shared) == 1
    finally:
        caching.cache_resource.clear()
        for bridge in bridges():
            bridge.close()


def bridges() -> list[Bridge]:
    """Those that live in this process."""
    return [found for found in gc.get_objects() if type(found) is Bridge]
