"""What the project says in numbers: the register of claims, pages whose numbers come from it, and reruns."""
