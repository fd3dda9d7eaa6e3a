/* What the emulator calls at each instruction, and at each load or store. */
#include <stdint.h>

void at_instruction(void *engine, uint64_t address, uint32_t size, uint64_t *count)
{
    (void)engine, (void)address, (void)size;
    ++*count;
}

void at_access(void *engine, int type, uint64_t address, int size, int64_t value, uint64_t *count)
{
    (void)engine, (void)type, (void)address, (void)size, (void)value;
    ++*count;
}
