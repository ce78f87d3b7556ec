"""An OpenAI-compatible server on one engine: HTTP here, inference on one worker thread.

``limits`` what is accepted; ``protocol`` what requests and answers look like; ``text`` tokens to text; ``worker`` the
thread that runs the serving loop; ``metrics`` what Prometheus reads; ``app`` the routes; ``listen`` sockets, signals.
Needs the extra ``serve``. No inference logic is here.
"""
