"""Reading attention inside `torch.compile`.

While a watcher is armed, compiled functions run a second version of themselves: Dynamo compiles it from the
same code with the same backend, and an operator that reads is inserted before each attention call. The
version that runs on other steps is the one that the user compiled, untouched.

    switch    chooses the version, and has graphs rewritten when they are compiled
    rewrite   inserts the operator
    graph     finds the attention in a graph, by running it on fake tensors under the eyes of the observer
    plan      what was found, without the tensors
    operator  the operator: gives the tensors back to their plan
    replay    reads a call as in eager mode, from a plan and its tensors
"""
