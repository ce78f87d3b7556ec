"""An OpenAI-compatible server on one engine: HTTP here, inference on one worker thread.

``limits`` what is accepted; ``served_model`` what is known of the model; ``fields`` what a request may bring;
``conversation`` messages to a prompt; ``protocol`` what is wanted; ``replies`` what answers look like; ``worker`` the
thread that runs the serving loop; ``backend`` between it and the routes; ``metrics`` what Prometheus reads; ``app`` the
routes; ``listen`` sockets, signals. The same routes stand before many engines in `workbench.serving.replicas`.
Needs the extra ``serve``. No inference logic is here.
"""
