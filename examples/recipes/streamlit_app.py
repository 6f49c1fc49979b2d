"""Streamlit: a chat over one model, which all sessions and all reruns share.

Run it with ``streamlit run examples/recipes/streamlit_app.py``.
"""

import streamlit as st

from lmbridge import Bridge


@st.cache_resource(show_spinner="Loading the model")
def shared_bridge():
    return Bridge("demo").start()


bridge = shared_bridge()
messages = st.session_state.setdefault("messages", [])
for message in messages:
    st.chat_message(message["role"]).write(message["content"])

if prompt := st.chat_input("Say something"):
    st.chat_message("user").write(prompt)
    asked = [*messages, {"role": "user", "content": prompt}]
    with st.chat_message("assistant"):
        text = st.write_stream(delta.text for delta in bridge.stream(asked, timeout=120))
    messages += [asked[-1], {"role": "assistant", "content": text}]  # a rerun in the middle leaves no half turn
