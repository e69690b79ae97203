//! What the verbs print when all is well.
