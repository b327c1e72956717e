"""A scene learns: text-to-3D by score distillation, with geometry that is measured."""
