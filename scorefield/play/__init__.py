"""What ``scorefield play`` is made of: models, functions from a request to pictures, the page, the server.

What a pillar can do is named by strings, as the commands are: nothing here imports one.
"""
