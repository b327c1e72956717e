"""A rendered world of nine solids with captions, so that teachers, scenes and judges mean something offline.

Conventions:

- The world has z up, and the front of a solid points to +x; azimuth 0 looks at it, azimuth 90 from +y. Degrees.
- ``camera_to_world`` is nerfstudio's and OpenGL's: x right, y up, z backwards.
- Pictures are in [-1, 1], (b, 3, h, w), in display values; ``toyworld.render`` states how they are lit.
"""
