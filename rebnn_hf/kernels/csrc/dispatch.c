/* Which instruction sets are compiled in and which of them this CPU runs. */
#include <string.h>

#include "isa.h"

static const rebnn_isa *const compiled[] = {
#ifdef REBNN_X86
    &rebnn_avx512vpopcnt, &rebnn_avx512, &rebnn_avx2,
#endif
#ifdef REBNN_ARM
    &rebnn_neon,
#endif
    &rebnn_portable,
};
enum { COMPILED = sizeof compiled / sizeof *compiled };

int rebnn_abi_version(void) { return REBNN_ABI_VERSION; }

const char *rebnn_isa_name(int index)
{
    return index >= 0 && index < (int)COMPILED ? compiled[index]->name : NULL;
}

int rebnn_isa_runs(const char *name) { return name && rebnn_isa_find(name) != NULL; }

const rebnn_isa *rebnn_isa_find(const char *name)
{
    for (int i = 0; i < (int)COMPILED; i++)
        if ((!name || !strcmp(name, compiled[i]->name)) && compiled[i]->runs())
            return compiled[i];
    return NULL;
}
