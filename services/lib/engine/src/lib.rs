//! The walk through the layers that prefill and decode share: qkv → local and remote attention → merge → finish.
