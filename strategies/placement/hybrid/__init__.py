"""One weird trick (Krizhevsky 2014): linear layers in columns, whose examples stay with the ranks that have them.

``schemes`` deals the examples of a step out to passes; ``linear`` runs a layer in these passes while the next one's
activations travel; ``layout`` says which layers are in columns; ``updates`` steps parts of an optimizer.
"""
