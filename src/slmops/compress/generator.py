from pathlib import Path
def export_generator(*a,**k)->None: raise NotImplementedError
