"""Giving models' files to other members, behind everything else that a peer does.

sharing     which models this member gives, and what it has of each
uploads     how fast, and to whom it has given what
options     the options about it
"""
