"""A server of live video: one engine, several watchers, each with a stream that can be steered.

protocol.py says what goes over the wire; docs/serve.md says it for people. The extra `serve` installs what
this package needs besides the runtime.
"""
