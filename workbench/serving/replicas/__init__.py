"""One service on many engines: `emoe serve --replicas`, on Ray Serve (extra ``ray``).

``replica`` an engine and its worker, as a Serve deployment; ``residency`` what it tells of its experts; ``routing``
which replica gets a request; ``front`` what stands between them and the routes of `workbench.serving.server`;
``service`` starts and ends all this.

Serve places replicas, starts a dead one anew, asks each for its health and experts, and passes requests on by a request
router of ours. Its HTTP proxies are off: their address is the whole cluster's, set once, and has paths that ask for no
key. The front is the same server as `emoe serve`, so limits, keys, slow clients and SIGTERM are the same code.
"""
