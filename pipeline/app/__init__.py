"""The page: a person's photo in a browser, and sliders that move it.

    messages  what the page and the server say to each other
    shelf     other models to choose from, and runs to watch while they train
    study     blinded pictures that people rate, and what their answers say
    session   one person's photo, encoded once, and its pictures as sliders move
    server    the page's files, one WebSocket a person, and who may open one
    page/     the page itself: HTML, a style sheet and a script
"""
