"""What two scripts share. Modules import downward only and never import a script."""
